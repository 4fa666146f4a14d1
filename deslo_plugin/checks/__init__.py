"""Are replicas what they should be?"""
