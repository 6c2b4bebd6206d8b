"""What makes the demo model: its texts, its training, its exam."""
