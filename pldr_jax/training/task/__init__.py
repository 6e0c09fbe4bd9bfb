"""Fine-tuning of a task's head: its data and its evaluation."""
