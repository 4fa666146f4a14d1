"""How does it travel between ranks?"""
