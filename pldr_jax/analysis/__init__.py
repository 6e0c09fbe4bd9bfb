"""What the deductive outputs of a trained model are: measured, drawn, written to a folder."""
