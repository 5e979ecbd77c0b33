"""The bot's handlers, one module per conversation. Each module ends with the table of its steps."""

from aiogram import F, Router
from aiogram.filters import Command, CommandStart

from project.handlers import feedback, general, lunch, order, support

IN_PRIVATE = F.chat.type == "private"
IN_GROUP = F.chat.type.in_({"group", "supergroup"})


def build_router() -> Router:
    """Return a new router with every conversation.

    The commands come first, so that each works in every state and none is taken for an answer;
    the fallback comes last, for what no conversation took.
    """
    router = Router(name="bot")
    router.include_routers(
        commands(), order.router(), support.router(), feedback.router(), lunch.router(), general.fallback()
    )
    return router


def commands() -> Router:
    router = Router(name="commands")
    message = router.message
    message.register(general.cancel, Command("cancel"))
    message.register(general.start, CommandStart(), IN_PRIVATE)
    message.register(order.start, Command("order"), IN_PRIVATE)
    message.register(support.start, Command("support"), IN_PRIVATE)
    message.register(feedback.start, Command("feedback"), IN_PRIVATE)
    message.register(lunch.start, Command("lunch"), IN_GROUP)
    message.register(lunch.only_in_groups, Command("lunch"), IN_PRIVATE)
    return router
