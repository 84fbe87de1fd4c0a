"""What compression cost and what drafting gained: perplexity, fidelity, speed, gates."""
