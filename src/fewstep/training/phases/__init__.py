"""What is trained, one file a phase: autoencoder, text encoder, teacher, consistency model."""
