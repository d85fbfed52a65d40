"""What a run leaves for people: pictures of what the network was shown and learned, and one html page."""
