"""The one exception for a user's mistake.

Costs nothing; raise it wherever the cause lies outside the program (a file, an option, a machine). Anything else
that is raised is a defect of this project and keeps its traceback.
"""

import click


class UserError(click.ClickException):
    """A mistake the user can mend: one line that names the file, the thing and the remedy.

    Click prints it as ``Error: ...`` on standard error and exits with status 2, without a traceback.
    """

    exit_code = 2
