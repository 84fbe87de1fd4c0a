"""Bit packing and packed matrix products: tensors in, tensors out; knows no model."""
