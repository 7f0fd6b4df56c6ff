"""One file per paper: a method is data (roles, phases, tables) plus target functions, never a loop."""
