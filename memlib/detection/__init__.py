"""Which prompts are memorized, told from the first calls of the network."""
