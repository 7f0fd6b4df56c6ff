"""The one trainer: it runs the phases of any method and can be stopped at any step. Needs torch."""
