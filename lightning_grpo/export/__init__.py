"""A trained policy as a folder of transformers or peft, which is compared with its source."""
