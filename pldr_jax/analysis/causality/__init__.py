"""The loss with G_LM of the row, the prefix, another row, or a calibrated one."""
