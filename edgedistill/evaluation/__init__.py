"""How good samples are: distances to real data and to the many-step teacher."""
