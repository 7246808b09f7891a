"""Tools: small programs around the trainer. Import them from `lightning_grpo.tools`."""
