"""Training text: samples, answers written anew, stored features."""
