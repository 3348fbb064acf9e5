"""From raw text in the Pile's format to tokenised, blended training samples."""
