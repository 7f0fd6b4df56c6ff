"""Networks: the UNets, how they are stored, cut smaller, and seen as denoisers. Needs torch."""

import logging

# diffusers warns at import that `optimum` comes in several distributions, which is how optimum is made.
logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
