"""Many models on the same text, with the same to spend: what each comes to."""
