"""What changes the logits of one request: penalties, biases, bans. One file each."""
