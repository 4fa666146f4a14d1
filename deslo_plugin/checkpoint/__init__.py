"""What is saved, and what is loaded?"""
