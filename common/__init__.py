"""What both sides must agree on, to the byte: plan, messages, names, errors."""
