"""Scores of networks beside the stored teacher."""
