"""Weight quantization: the stages of a run, and one file per method in `methods` and `lm_head`."""
