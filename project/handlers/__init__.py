"""The bot's handlers, one module per conversation. Each module ends with the table of its steps."""

from aiogram import Router

from project.handlers import feedback, general, lunch, order, support


def build_router() -> Router:
    """Return a new router with every conversation.

    The commands come first, so that /cancel works in every state; `general.fallback` comes
    last and answers what no conversation took.
    """
    router = Router(name="bot")
    router.include_routers(
        general.commands(),
        order.router(),
        support.router(),
        feedback.router(),
        lunch.router(),
        general.fallback(),
    )
    return router
