"""KV stores: how the keys and values of one layer are kept, one file each."""
