"""What each part of a run costs in memory, per phase and device, before it is made."""
