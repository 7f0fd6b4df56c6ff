"""What goes out with a bundle and where: its model card, and the hub."""
