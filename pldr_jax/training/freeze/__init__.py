"""One calibrated G_LM in place of the PLGA network, with a certificate."""
