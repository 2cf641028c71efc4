"""Make pictures from prompts: the source `synthesize`."""
