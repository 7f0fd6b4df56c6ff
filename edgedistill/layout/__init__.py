"""What other people's loaders demand of a pipeline folder: their contracts as data, and checks against them."""
