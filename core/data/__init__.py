"""Reading of texts, prompts and conversations from files and data sets."""
