"""Weight quantization: the block walk, the ledger of stored bits, one file per method."""
