"""Controls: penalties, biases and bans on the logits of one request, one file each."""
