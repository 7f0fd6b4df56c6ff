"""Bundle to smaller bundle: NNCF and Core ML compression."""
