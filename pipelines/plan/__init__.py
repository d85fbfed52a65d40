"""What each view will be: numbers only, drawn before anything is decoded."""
