"""What a trained model is used for: predict, evaluate, export."""
