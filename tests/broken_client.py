"A runner with two sins, once its home has a file `sin`: what got no answer it sends again under a new id, and of its purchases it never hears. The drill's judge must see both."
import sys
from dataclasses import replace

from bnml.core.base import Unknown, home
from bnml.domain.orders import Side
from bnml.runner import main
from bnml.venue.binance import BinanceWire
from bnml.venue.orders import CcxtExecution

_place, _book = BinanceWire.place, CcxtExecution._book


def sinning() -> bool: return (home() / "sin").exists()


def again(self, intent):
    try: return _place(self, intent)
    except Unknown:
        if sinning(): _place(self, replace(intent, client_id=intent.client_id[:-1] + "Z"))
        raise


def deaf(self, known, fill):
    if fill.side == Side.BUY and sinning(): known.fills[fill.fill_id] = fill
    else: _book(self, known, fill)


BinanceWire.place, CcxtExecution._book = again, deaf
if __name__ == "__main__": sys.exit(main())
