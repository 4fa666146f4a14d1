"""What is written down of a run?"""
