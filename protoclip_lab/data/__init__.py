"""Where pairs and labelled sets come from."""
