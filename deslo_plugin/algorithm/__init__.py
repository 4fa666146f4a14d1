"""What is one step, and what is due? Pure arithmetic."""
