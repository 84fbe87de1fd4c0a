"""Methods that fit a replacement for the lm_head."""
