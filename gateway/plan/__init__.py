"""`twolane plan`: what two engines would be on these cards."""
