"""Looking at results: pictures of trees and of what heads know."""
