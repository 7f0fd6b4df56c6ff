"""Bundle to samples: one session per runtime, and parity between them."""
