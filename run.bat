@echo off
rem Starts Z-Image Studio, setting it up first where that is needed: without arguments the page, with arguments
rem the command line (run.bat generate "a red apple"). install.py does the work; this finds a Python to start it.
setlocal
for %%P in ("py -3" "python3" "python") do (
    %%~P -ISc "import sys; sys.exit(sys.version_info < (3, 8))" >nul 2>nul && set "PYTHON=%%~P" && goto found
)
echo Z-Image Studio needs Python 3.11, 3.12 or 3.13, and no Python was found. Install one, then run this again. 1>&2
exit /b 1

:found
if "%~1"=="" goto page
%PYTHON% -IS "%~dp0install.py" "%~dp0cli.py" %*
exit /b %ERRORLEVEL%

:page
%PYTHON% -IS "%~dp0install.py" "%~dp0cli.py" serve
exit /b %ERRORLEVEL%
