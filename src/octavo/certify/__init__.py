"""The train = serve certificate: what the trainer's forward pass says, the engine and other programs say too."""
