"""How much to draft: measured costs, tuned trees, chains."""
