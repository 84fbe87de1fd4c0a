"""Training text: samples, regenerated answers, stored features."""
