"""Speaker networks and what turns their embeddings into scores."""
