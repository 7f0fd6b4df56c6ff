"""Networks: the UNets, how they are stored, cut smaller, and seen as denoisers. Needs torch."""
