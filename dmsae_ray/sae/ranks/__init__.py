"""What several workers have to do with each other: collectives, who holds which latents, and what rows they
exchange.
"""
