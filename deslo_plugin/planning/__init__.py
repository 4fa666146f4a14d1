"""What will it cost?"""
